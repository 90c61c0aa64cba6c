"""What the student is trained towards: velocity, consistency, trajectory, distribution."""
