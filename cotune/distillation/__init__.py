"""What a student learns from a teacher: divergences between next-token distributions, and teachers to ask for them."""
