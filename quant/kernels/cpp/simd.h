// Opens the region of a file whose functions are compiled for one instruction set.
//
// The wheel's baseline is plain x86-64; only code between TARGET_BEGIN and TARGET_END may use more, and it is
// reached only after isa.cpp has asked the processor. Standard headers are included before the region, so that
// no shared inline function is ever compiled for a newer processor.
#pragma once
#define COLDSTREAM_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define TARGET_BEGIN(features) \
  COLDSTREAM_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define TARGET_END COLDSTREAM_PRAGMA(clang attribute pop)
#else
#define TARGET_BEGIN(features) COLDSTREAM_PRAGMA(GCC push_options) COLDSTREAM_PRAGMA(GCC target(features))
#define TARGET_END COLDSTREAM_PRAGMA(GCC pop_options)
#endif
