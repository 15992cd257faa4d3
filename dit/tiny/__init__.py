"""What makes and examines the tiny model: its world, its subjects, its training, its judge."""
