"""Speed and quality against baselines; each module is a command: `python -m benchmarks.masks`."""
