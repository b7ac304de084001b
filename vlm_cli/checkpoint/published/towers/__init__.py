"""Vision towers as other programs write them: rules for their names, and their configurations, in OpenCLIP's terms."""
