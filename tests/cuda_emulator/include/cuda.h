#pragma once
#include "../hopper.h"
