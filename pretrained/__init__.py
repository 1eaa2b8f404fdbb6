"""Pretrained networks and their published weights: VGG-16, LPIPS, Inception, DINOv2, CLIP."""
