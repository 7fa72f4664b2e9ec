// The dsg command.
return 0;
