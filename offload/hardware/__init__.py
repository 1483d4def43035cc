"""What this machine has and gives: capacities, measured bandwidths, limits, and who holds how much."""
