"""Every public function, called with right and wrong arguments: a result that is right, or an error with a name."""
