"""`minigpt serve`: a pipeline behind OpenAI's HTTP interface, on the user's side.

    schema.py    what a request may say, and how errors are told
    service.py   the pipeline behind a queue: generations in threads, the stages' state, whether tokens come
    answers.py   tokens become OpenAI's JSON
    chat.py      messages become a prompt
    app.py       the routes
    guard.py     every request passes here first: who may ask, from where, how much, for how long; the log
    metrics.py   what Prometheus is told
    server.py    uvicorn, with bounds on connections

Read in this order, it is a program of half an hour. A stage never imports any of it.
"""
