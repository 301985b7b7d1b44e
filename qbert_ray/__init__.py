"""Semantic IDs and recommendations from a multimodal catalog, on Ray: Q-BERT4Rec and beyond.

The modules of this folder are the paper in plain PyTorch and NumPy; `pipelines` runs them on a Ray cluster.
"""
