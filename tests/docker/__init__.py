"""Real images and real containers (marker `docker`); skipped with the reason where no engine can be started."""
