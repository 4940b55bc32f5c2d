"""bundle/ -> an HTTP server that OpenAI clients use, by Starlette, uvicorn and pydantic, on the runtime's public API.

A request, from the socket to the socket:

- `connection`: uvicorn's HTTP parser, with a time limit for headers.
- `guard`: who may ask: Host, Origin, key; how much: the size and the time of a body.
- `app`: the table of all routes, each a row of `table`. `description`: the same table as an OpenAPI description.
- `api/`: `schemas`: a JSON body becomes a pydantic model. `options`: its fields as the runtime's options. `replies`:
  the shapes of answers.
- `routes/`: each route makes a `Job` of its model, and a reply or events of the chunks.
- `service`: the loaded model. It opens a job, lets it wait for its place, and reads it. `metrics` counts.
- `events`: server-sent events, with pings.
- `errors`: every exception as OpenAI's JSON.
- `command`: `pastkey serve`. `settings`: the values of its flags. `server`: uvicorn, from the load to the end.
"""
