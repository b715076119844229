// Written by `mogine deploy pm2`.
// pm2 start ecosystem.config.js && pm2 save && pm2 startup
// `pm2 reload` would not do more than `pm2 restart`: a restart ends answers in peace.
module.exports = {
  "apps": [
    {
      "name": "mogine-analytics",
      "script": "/opt/mogine/bin/mogine",
      "args": [
        "--home",
        "/srv/assistant",
        "serve",
        "analytics"
      ],
      "interpreter": "none",
      "cwd": "/srv/assistant",
      "exec_mode": "fork",
      "instances": 1,
      "wait_ready": true,
      "listen_timeout": 60000,
      "kill_timeout": 20000,
      "autorestart": true,
      "exp_backoff_restart_delay": 200,
      "max_memory_restart": "1G",
      "out_file": "/var/log/mogine/mogine_analytics_app.log",
      "error_file": "/var/log/mogine/mogine_analytics_app.log",
      "merge_logs": true,
      "env": {
        "PYTHONUNBUFFERED": "1"
      }
    },
    {
      "name": "mogine-kb",
      "script": "/opt/mogine/bin/mogine",
      "args": [
        "--home",
        "/srv/assistant",
        "serve",
        "kb"
      ],
      "interpreter": "none",
      "cwd": "/srv/assistant",
      "exec_mode": "fork",
      "instances": 1,
      "wait_ready": true,
      "listen_timeout": 60000,
      "kill_timeout": 20000,
      "autorestart": true,
      "exp_backoff_restart_delay": 200,
      "max_memory_restart": "1536M",
      "out_file": "/var/log/mogine/mogine_kb_app.log",
      "error_file": "/var/log/mogine/mogine_kb_app.log",
      "merge_logs": true,
      "env": {
        "PYTHONUNBUFFERED": "1"
      }
    },
    {
      "name": "mogine-proxy",
      "script": "/opt/mogine/bin/mogine",
      "args": [
        "--home",
        "/srv/assistant",
        "serve",
        "proxy"
      ],
      "interpreter": "none",
      "cwd": "/srv/assistant",
      "exec_mode": "fork",
      "instances": 1,
      "wait_ready": true,
      "listen_timeout": 60000,
      "kill_timeout": 20000,
      "autorestart": true,
      "exp_backoff_restart_delay": 200,
      "max_memory_restart": "512M",
      "out_file": "/var/log/mogine/mogine_proxy_app.log",
      "error_file": "/var/log/mogine/mogine_proxy_app.log",
      "merge_logs": true,
      "env": {
        "PYTHONUNBUFFERED": "1"
      }
    }
  ]
};
