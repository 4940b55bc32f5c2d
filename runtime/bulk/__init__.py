"""Many rows in one job: what a row asks for, who answers it, and a file that a kill in the middle does not harm."""
