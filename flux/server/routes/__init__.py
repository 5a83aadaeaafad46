"""The addresses of the server, thin: each route reads its request, calls one module, and answers."""
