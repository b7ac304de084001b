"""Vision towers of other programs as towers of OpenCLIP: their names and configurations."""
