"""Pretrained networks and their published weights: VGG-16, LPIPS, Inception."""
