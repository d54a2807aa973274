// The list of update rules. A rule's number stands in the `code` column of the table; numbers are never reused.
#pragma once

#include "adamw.h"
#include "sgd.h"

#define PB_FOR_EACH_RULE(X) \
    X(0, Sgd)               \
    X(1, SgdMomentum)       \
    X(2, AdamW)             \
    X(3, AdamWAmsgrad)
