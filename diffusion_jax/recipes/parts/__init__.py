"""What recipes are made of besides the rooms: latent spaces, worlds and procedures that one or several of them use."""
