"""softmax(q kᵀ) v over (B, N, D_QK), (B, M, D_QK), (B, M, D_V), without the map in memory."""
