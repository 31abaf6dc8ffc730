"""embeds: every distinct caption through the three text encoders, once."""
