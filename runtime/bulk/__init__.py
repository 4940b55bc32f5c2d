"""Many rows in one job: the request of a row, its answer, and a file that a kill in the middle does not harm."""
