"""Complete, runnable Pyro models on real data; `python -m models` lists them."""
