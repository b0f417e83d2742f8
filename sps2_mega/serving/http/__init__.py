"""OpenAI-compatible HTTP server for one engine, driven by rank 0.

main thread (engine_loop)            event loop thread (async_engine, app, routes)
take commands, step, take deltas <-- open, abort ---  requests
                                 --- StepResult --->  open calls -> JSON or SSE
"""
