"""Channel statistics, class counts and class weights."""
