"""The conversion service: HTTP, jobs, a web page. No ML here: every upload is opened by a child process alone (docs/service.md).

`store` what is known of uploads, jobs, events, keys and workers; `folders` where files lie; `child` the conversion with limits set on
itself; `conversion` that child seen from its worker; `worker` jobs as durable workflows (DBOS); `api` and what it is made of (`access`,
`problems`, `recipes`, `streams`, `metrics`); `server` one process with all of it; `client` the other end.
"""
