// Runs a kernel with the named mistake: what the emulator and the sanitizers must find.
#pragma once

void run_planted(const char* name);
