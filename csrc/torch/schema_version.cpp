#include "fmd/library.h"

extern "C" int fmd_ext_schema_version() { return fmd::kSchemaVersion; }
