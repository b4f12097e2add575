"""What is asked, and of which machine: plain data that every other room may import."""
