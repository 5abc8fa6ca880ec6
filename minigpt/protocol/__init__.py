"""What clients and stages say to each other, and what both demand of a link."""
