"""The server: datasets, trainings and pictures over HTTP. `python -m flux.server`; needs requirements-server.txt."""
