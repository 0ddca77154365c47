"""Training of encoder, projection, policy and decoder adapter."""
