"""What is computed: teacher, student, exam and everything that they are made of. Prints nothing."""
