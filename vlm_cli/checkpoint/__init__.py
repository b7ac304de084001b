"""Where parts come from and where compositions go: names, hubs, directories and weight files."""
