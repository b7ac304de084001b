"""Compare compositions: the same training and the same questions for each point of a grid."""
