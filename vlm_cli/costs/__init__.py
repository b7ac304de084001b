"""What a composition costs, without a weight: positions, floating-point operations, bytes and estimated seconds."""
