"""Files for the programs around mogine: a web server, supervisors, cron."""
