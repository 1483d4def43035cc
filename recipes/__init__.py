"""TOML recipes, the demo model and the script that trains it; read through importlib.resources."""
