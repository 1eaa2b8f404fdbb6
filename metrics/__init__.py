"""Sample quality (FID and other metrics, their protocols and tables) and training cost."""
