"""Where blocks are worked on, and in how much memory."""
