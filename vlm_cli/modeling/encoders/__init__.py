"""Vision encoders that vlm makes of other libraries' models, behind the functions of `vlm_cli.modeling.towers`."""
