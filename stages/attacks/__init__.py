"""What brings forgotten answers back."""
