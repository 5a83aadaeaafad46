"""Datasets, trainings and pictures over HTTP: `python -m flux.server`, with requirements-server.txt."""
