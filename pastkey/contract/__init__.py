"""What a folder of each stage is: names, a checkpoint's configuration, a bundle's manifest."""
