// The Python module ddpm_fast._cuda. It needs no torch header: ddpm_fast/kernels gives addresses, sizes and strides of tensors
// that ddpm_fast/ops has checked; the checks here guard what the kernels rely on. An address of 0 is none.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "group_norm_silu.h"
#include "sampler_step.h"

namespace py = pybind11;
using namespace ddpm::cuda;

namespace {

using Address = uintptr_t;
using ImageOf = std::tuple<Address, int64_t, int64_t>;        // data, elements from image to image and pixel to pixel
using RowOf = std::tuple<Address, int, int64_t>;              // data, dtype, elements from image to image
using ArrayOf = std::tuple<Address, int64_t, int, bool>;      // data, elements from sample to sample, dtype, channels_last
using DrawsOf = std::tuple<Address, Address, Address, int64_t, uint32_t>;  // seed, draw, first sample or its value, stream
using CutOf = std::tuple<int, int, int, int, bool, bool>;     // as Cut has them

void must(Error error, const char* what) {
  if (error != Error{}) throw std::runtime_error(std::string(what) + ": CUDA says: " + text(error));
}

void check(bool right, const char* what) {
  if (!right) throw py::value_error(what);
}

int32_t narrow(int64_t v) {
  check(v >= std::numeric_limits<int32_t>::min() && v <= std::numeric_limits<int32_t>::max(), "a size of 2^31 or more");
  return int32_t(v);
}

Image image(const ImageOf& of) {
  return {reinterpret_cast<void*>(std::get<0>(of)), std::get<1>(of), narrow(std::get<2>(of))};
}

Row row(const RowOf& of) {
  return {reinterpret_cast<const void*>(std::get<0>(of)), Type(std::get<1>(of)), narrow(std::get<2>(of))};
}

Array array(const ArrayOf& of) {
  const auto& [data, sample, type, last] = of;
  return {reinterpret_cast<void*>(data), sample, Type(type), last};
}

Draws draws(const DrawsOf& of) {
  const auto at = [](Address address) { return reinterpret_cast<const int64_t*>(address); };
  const auto& [seed, draw, first_sample, first, stream] = of;
  return {at(seed), at(draw), at(first_sample), first, stream};
}

// `given`: what every kernel of the norm is told, as ddpm_fast/kernels/group_norm_cuda.py puts it together.
void fill(GroupNorm& g, const py::dict& given) {
  const auto sizes = given["sizes"].cast<std::array<int64_t, 5>>();  // images, pixels, channels, of x, groups
  g.images = sizes[0];
  g.pixels = narrow(sizes[1]);
  g.channels = narrow(sizes[2]);
  g.channels_1 = narrow(sizes[3]);
  g.groups = narrow(sizes[4]);
  check(g.images > 0 && g.pixels > 0 && g.channels > 0, "no images");
  check(g.groups > 0 && g.channels % g.groups == 0, "groups must divide the channels");
  narrow(int64_t{g.pixels} * g.channels);
  g.eps = given["eps"].cast<float>();
  g.activation = Activation(given["activation"].cast<int>());
  g.type = Type(given["dtype"].cast<int>());
  g.x = image(given["x"].cast<ImageOf>());
  g.x2 = image(given["x2"].cast<ImageOf>());
  const auto rows = given["parameters"].cast<std::array<RowOf, 5>>();
  Row* const to[] = {&g.weight, &g.bias, &g.add, &g.scale, &g.shift};
  for (size_t i = 0; i < 5; ++i) *to[i] = row(rows[i]);
  g.statistics = reinterpret_cast<double*>(given["statistics"].cast<Address>());
  g.table = reinterpret_cast<float*>(given["table"].cast<Address>());
  g.draws = draws(given["draws"].cast<DrawsOf>());
  g.threshold = given["threshold"].cast<uint32_t>();
  g.factor = given["factor"].cast<float>();
  const auto [slab, pixels, chunks, threads, vectors, one_pass] = given["cut"].cast<CutOf>();
  g.cut = {slab, pixels, chunks, threads, vectors, one_pass};
}

// Whether an image begins where vectors of `count` elements may, and goes on so.
bool fits(const Image& image, int count) {
  return image.data == nullptr ||
         (reinterpret_cast<Address>(image.data) % 16 == 0 && image.image % count == 0 && image.pixel % count == 0);
}

void check_cut(const GroupNorm& g, const std::vector<Image>& images) {
  const Cut& cut = g.cut;
  const int vector = !cut.vectors ? 1 : g.type == Type::float32 ? 4 : 8;
  bool fit = g.channels % vector == 0 && g.channels_1 % vector == 0 && cut.slab % vector == 0;
  for (const Image& image : images) fit = fit && (vector == 1 || fits(image, vector));
  check(fit, "images that don't lie in vectors of 16 bytes");
  const int per_group = g.channels / g.groups;
  check(cut.slab > 0 && cut.slab % per_group == 0, "a slab must be whole groups");
  check(cut.threads > 0 && cut.threads <= 256 && cut.threads % 32 == 0 && cut.slab / vector <= cut.threads,
        "a block has 32 to 256 threads, and one for each vector of a slab");
  check(cut.pixels > 0 && cut.chunks > 0 && int64_t{cut.pixels} * cut.chunks >= g.pixels, "chunks miss pixels");
  check(cut.one_pass ? cut.vectors && cut.chunks <= 8 : g.table != nullptr, "one pass is for vectors and 8 blocks");
  const int64_t slabs = (g.channels + cut.slab - 1) / cut.slab;
  check(g.images <= std::numeric_limits<int32_t>::max() / (slabs * cut.chunks), "more blocks than a grid has");
}

void norm_forward(const py::dict& given, const ImageOf& residual, const ImageOf& h, const ImageOf& y, int device,
                  Address stream) {
  Forward f{};
  fill(f, given);
  f.residual = image(residual);
  f.h = image(h);
  f.y = image(y);
  check_cut(f, {f.x, f.x2, f.residual, f.h, f.y});
  must(use(device), "group_norm_silu");
  must(group_norm_silu(f, reinterpret_cast<Stream>(stream)), "group_norm_silu");
}

void norm_backward(const py::dict& given, const ImageOf& dy, const ImageOf& dh, const ImageOf& dx, const ImageOf& dx2,
                   Address rows, int device, Address stream) {
  Backward b{};
  fill(b, given);
  b.dy = image(dy);
  b.dh = image(dh);
  b.dx = image(dx);
  b.dx2 = image(dx2);
  b.rows = reinterpret_cast<float*>(rows);
  check_cut(b, {b.x, b.x2, b.dy, b.dh, b.dx, b.dx2});
  must(use(device), "group_norm_silu");
  must(group_norm_silu_backward(b, reinterpret_cast<Stream>(stream)), "group_norm_silu");
}

void step(const std::array<ArrayOf, 7>& arrays, const std::array<int64_t, 4>& sizes, Address rows, int rows_type,
          int columns, Address k, float clip, bool drawn, const DrawsOf& from, int device, Address stream) {
  SamplerStep of{};
  Array* const to[] = {&of.out, &of.x0_out, &of.x, &of.model_out, &of.hist, &of.noise, &of.variance};
  for (size_t i = 0; i < 7; ++i) *to[i] = array(arrays[i]);
  of.samples = sizes[0];
  of.size = narrow(sizes[1]);
  of.channels = narrow(sizes[2]);
  of.pixels = narrow(sizes[3]);
  check(of.samples > 0 && of.size > 0, "no samples");
  check(of.size <= std::numeric_limits<int32_t>::max() - 2048, "a size of 2^31 or more");
  check(of.samples <= std::numeric_limits<int32_t>::max() / ((of.size + 1023) / 1024), "more blocks than a grid has");
  of.rows = reinterpret_cast<const void*>(rows);
  of.rows_type = Type(rows_type);
  of.columns = columns;
  check(columns >= (of.variance.data == nullptr ? 8 : 9), "rows with too few columns");
  of.k = reinterpret_cast<const int64_t*>(k);
  of.clip = clip;
  of.drawn = drawn;
  of.draws = draws(from);
  must(use(device), "sampler_step");
  must(sampler_step(of, reinterpret_cast<Stream>(stream)), "sampler_step");
}

std::tuple<int, int, int> limits_of(int device) {
  Limits of{};
  must(limits(device, of), "the GPU");
  return {of.major, of.processors, of.shared};
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of ddpm_fast; called by ddpm_fast.kernels, which puts their arguments together.";
  using namespace py::literals;
  m.attr("device_type") = kDeviceType;
  m.def("limits", &limits_of, "device"_a, "Compute capability, processors, and bytes of shared memory a block may have.");
  m.def("group_norm_silu", &norm_forward, "given"_a, "residual"_a, "h"_a, "y"_a, "device"_a, "stream"_a);
  m.def("group_norm_silu_backward", &norm_backward, "given"_a, "dy"_a, "dh"_a, "dx"_a, "dx2"_a, "rows"_a, "device"_a,
        "stream"_a);
  m.def("sampler_step", &step, "arrays"_a, "sizes"_a, "rows"_a, "rows_type"_a, "columns"_a, "k"_a, "clip"_a, "drawn"_a,
        "draws"_a, "device"_a, "stream"_a);
}
