"""What is computed: prompts, engines, the teacher's stage, the student's loop, evaluation. No argv, no printing."""
