"""What is kept of a picture: policies score, budget rules share out, one place chooses. Higher score = keep."""
