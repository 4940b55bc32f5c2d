"""The content of each stage's folder: names, a checkpoint's configuration, a bundle's manifest."""
