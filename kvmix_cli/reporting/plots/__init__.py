"""Pictures for PNG files and for the page. Importing a file of this room loads matplotlib."""
