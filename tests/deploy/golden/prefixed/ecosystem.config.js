// Written by `mogine deploy pm2`.
// pm2 start ecosystem.config.js && pm2 save && pm2 startup
// `pm2 reload` would not do more than `pm2 restart`: a restart ends answers in peace.
module.exports = {
  "apps": [
    {
      "name": "mogine-analytics",
      "script": "/home/li/venv/bin/mogine",
      "args": [
        "--home",
        "/home/li/my assistant",
        "serve",
        "analytics"
      ],
      "interpreter": "none",
      "cwd": "/home/li/my assistant",
      "exec_mode": "fork",
      "instances": 1,
      "wait_ready": true,
      "listen_timeout": 60000,
      "kill_timeout": 20000,
      "autorestart": true,
      "exp_backoff_restart_delay": 200,
      "max_memory_restart": "1G",
      "out_file": "/www/wwwlogs/mogine_analytics_app.log",
      "error_file": "/www/wwwlogs/mogine_analytics_app.log",
      "merge_logs": true,
      "env": {
        "PYTHONUNBUFFERED": "1"
      }
    },
    {
      "name": "mogine-kb",
      "script": "/home/li/venv/bin/mogine",
      "args": [
        "--home",
        "/home/li/my assistant",
        "serve",
        "kb"
      ],
      "interpreter": "none",
      "cwd": "/home/li/my assistant",
      "exec_mode": "fork",
      "instances": 1,
      "wait_ready": true,
      "listen_timeout": 60000,
      "kill_timeout": 20000,
      "autorestart": true,
      "exp_backoff_restart_delay": 200,
      "max_memory_restart": "1536M",
      "out_file": "/www/wwwlogs/mogine_kb_app.log",
      "error_file": "/www/wwwlogs/mogine_kb_app.log",
      "merge_logs": true,
      "env": {
        "PYTHONUNBUFFERED": "1"
      }
    },
    {
      "name": "mogine-proxy",
      "script": "/home/li/venv/bin/mogine",
      "args": [
        "--home",
        "/home/li/my assistant",
        "serve",
        "proxy"
      ],
      "interpreter": "none",
      "cwd": "/home/li/my assistant",
      "exec_mode": "fork",
      "instances": 1,
      "wait_ready": true,
      "listen_timeout": 60000,
      "kill_timeout": 20000,
      "autorestart": true,
      "exp_backoff_restart_delay": 200,
      "max_memory_restart": "512M",
      "out_file": "/www/wwwlogs/mogine_proxy_app.log",
      "error_file": "/www/wwwlogs/mogine_proxy_app.log",
      "merge_logs": true,
      "env": {
        "PYTHONUNBUFFERED": "1"
      }
    }
  ]
};
