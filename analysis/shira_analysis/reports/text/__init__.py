"""Reports as text for a terminal and as plain JSON values, a module for each subject."""
