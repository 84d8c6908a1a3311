"""The profile by class of kernel: names find their class, times and launches add up, and a failure is a row."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType

from benchmarks import gpu_profile, sampling
from benchmarks.gpu_profile import CONVOLUTION, COPY, IDLE, OTHER, PRODUCT
from benchmarks.harness import OURS, markdown
from benchmarks.problem import Contender, Problem
from ddpm_fast import preset

TINY = replace(preset("digits"), base_channels=8, num_res_blocks=1, dropout=0.0)
INDUCTOR, NOISE, OPTIMIZER = "fused by inductor", "noise, sampler, loss", "optimizer and EMA"
AT = "void at::native::"
KERNELS = {
    CONVOLUTION: [
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_warpgroupsize1x1x1_g1_execute",
        "sm80_xmma_wgrad_implicit_gemm_indexed_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x32_stage4_kernel_cudnn",
        "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816dgrad_optimized_bf16_128x128_32x5_nhwc_align8>",
        "void cutlass_cudnn_infer::Kernel<cutlass_tensorop_f16_s16816fprop_optimized_f16_256x64_32x4_nhwc_align8>(P)",
        "void cudnn::winograd_nonfused::winogradForwardData4x4<float, float>(cudnn::WinogradDataParams<float, float>)",
        "void implicit_convolve_sgemm<float, float, 128, 5, 5, 3, 3, 3, 1, false, false, true>(int, int)",
        f"{AT}(anonymous namespace)::conv_depthwise2d_forward_kernel<3, float, int>(int)",
        "triton_tem_fused_convolution_silu_7",
        "triton_convolution2d_3",
        "conv3x3_fwd_kernel",
        "aten::mkldnn_convolution",
        "autograd::engine::evaluate_function: ConvolutionBackward0",
    ],
    PRODUCT: [
        "nvjet_tst_128x64_64x11_1x2_h_bz_coopA_bias_TNN",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_warpgroupsize1x1x1_execute_segment_k_off_cublas",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_64x64_64x6_tn_align8>(Params)",
        "ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_64x4_tn",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16>(P)",
        "void gemv2T_kernel_val<int, int, float, float, float, float, 128, 16, 4, 4, false>(P)",
        "triton_tem_fused_addmm_silu_2",
        "triton_mm_12",
        "aten::baddbmm",
        "AddmmBackward0",
    ],
    "attention": [
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 64, 4, cutlass::bfloat16_t>>(P)",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>)",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_kernel0_0",
        "void (anonymous namespace)::softmax_warp_forward<float, float, float, 8, false, false>(float*, int)",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
    ],
    "group norm": [
        "group_norm_silu_fwd_kernel",
        "norm_merge_kernel",
        "two_pass_norm_sums_kernel",
        "group_norm_silu_bwd_kernel",
        f"{AT}(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::BFloat16>(long, float, c10::BFloat16*)",
        f"{AT}(anonymous namespace)::ComputeBackwardFusedParamsCUDAKernel<float>(long, long, long)",
        f"{AT}vectorized_elementwise_kernel<4, {AT[5:]}GroupNormKernelImplInternal<float>::lambda>(int)",
        "aten::native_group_norm_backward",
    ],
    NOISE: [
        "q_sample_kernel",
        "sampler_step_kernel",
        "diffusion_loss_fwd_kernel",
        "noise_kernel",
        "timesteps_kernel",
        "timestep_embedding_kernel",
        f"{AT}(anonymous namespace)::distribution_elementwise_grid_stride_kernel<float, 4, normal_and_transform>(P)",
        f"{AT}(anonymous namespace)::fused_dropout_kernel_vec<float, float, unsigned int, 1, 4, bool>(P)",
        "aten::randn_like",
        "aten::normal_",
        "aten::mse_loss",
    ],
    OPTIMIZER: [
        f"{AT}(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<4>, FusedAdamMathFunctor<float, 4>>",
        f"{AT}vectorized_elementwise_kernel<4, at::native::lerp_scalar_kernel(at::TensorIteratorBase&)::lambda>(int)",
        "ema_update_kernel",
        "aten::_foreach_copy_",
        "Optimizer.step#Adam.step",
    ],
    INDUCTOR: [
        "triton_poi_fused_convolution_silu_3",
        "triton_red_fused_native_group_norm_5",
        "triton_per_fused__softmax_mm_9",
        "triton_for_fused_adam_0",
    ],
    COPY: [
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        f"{AT}unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::lambda>(int)",
        f"{AT}(anonymous namespace)::CatArrayBatchedCopy_aligned16_contig<at::native::OpaqueType<2>, 4, 64>(P)",
        "void cudnn::ops::nchwToNhwcKernel<__half, __half, float, false, true, (cudnnKernelDataType_t)0>(P)",
        "void cudnn::engines_precompiled::nhwcToNchwKernel<float, float, float, true, false>(P)",
        f"{AT}(anonymous namespace)::upsample_nearest2d_nhwc_out_frame<c10::BFloat16>(P)",
        "aten::contiguous",
    ],
    "reductions": [
        f"{AT}reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float, float, float, float>>>(P)",
        "aten::sum",
    ],
    "pointwise": [
        f"{AT}vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, std::array<char*, 3ul>>(int)",
        f"{AT}elementwise_kernel<128, 2, at::native::gpu_kernel_impl_nocast<at::native::silu_kernel>>(int)",
        "residual_sum_kernel",
        "aten::silu_backward",
        "aten::add_",
    ],
    OTHER: ["aten::empty_strided", "detach", "void at_cuda_detail::cub::DeviceScanKernel<P>(int)"],
}


@pytest.mark.parametrize(("kernel", "expected"), [(kernel, name) for name in KERNELS for kernel in KERNELS[name]])
def test_class_of(kernel, expected):
    assert gpu_profile.kernel_class(kernel) == expected


def test_every_class_is_tried():
    assert {name for name, _ in gpu_profile.CLASSES} | {OTHER} == set(KERNELS)


def average(key: str, count: int, us: float, device: DeviceType = DeviceType.CUDA, annotation: bool = False):
    times = {"self_device_time_total": us, "self_cpu_time_total": 7.0}
    return SimpleNamespace(key=key, count=count, device_type=device, is_user_annotation=annotation, **times)


def test_on_a_gpu_only_what_ran_there_counts():
    averages = [
        average("nvjet_tst_128x64", 4, 1500.0),
        average("gemv2T_kernel_val", 2, 500.0),
        average("noise_kernel", 2, 1000.0),
        average("cudaLaunchKernel", 8, 3000.0, DeviceType.CPU),
        average("ProfilerStep#1", 1, 9000.0, annotation=True),
    ]
    work = gpu_profile.by_class(averages, torch.device("cuda"))
    assert work == {PRODUCT: (6, 2.0), NOISE: (2, 1.0)}
    rows = gpu_profile.rows_of(work, wall=4.0, steps=2)
    assert rows == [
        {"kernels": PRODUCT, "launches": 3, "ms": 1.0, "share_of_run": 0.5},
        {"kernels": NOISE, "launches": 1, "ms": 0.5, "share_of_run": 0.25},
        {"kernels": IDLE, "ms": 0.5, "share_of_run": 0.25},
    ]
    assert gpu_profile.rows_of(work, wall=2.5, steps=2)[-1]["ms"] == 0  # streams that overlap


def test_each_contender_has_a_row_a_class():
    convolution, x, runs = nn.Conv2d(3, 3, 3), torch.randn(2, 3, 8, 8), []

    def two_a_step(problem: Problem) -> Contender:
        @torch.no_grad()
        def run() -> torch.Tensor:
            runs.append(None)
            for _ in range(2 * problem.steps):
                torch.mkldnn_convolution(x, convolution.weight, None, (0, 0), (1, 1), (1, 1), 1)
            return torch.sigmoid(x)

        return Contender(run, run)

    def broken(problem: Problem) -> Contender:
        raise RuntimeError("no such GPU\nat all")

    problem = Problem(TINY, torch.device("cpu"), batch=2, steps=3, precision="float32")
    builders = {OURS: sampling.ours, "broken": broken, "two": two_a_step}
    rows = gpu_profile.measure("sample digits", problem, builders)
    assert all((row["case"], row["precision"], row["batch"]) == ("sample digits", "float32", 2) for row in rows)
    assert list(dict.fromkeys(row["name"] for row in rows)) == list(builders)
    assert [row["error"] for row in rows if row["name"] == "broken"] == ["RuntimeError: no such GPU"]
    assert len(runs) == 2  # the warm-up and the profiled one
    launches = {row["kernels"]: row.get("launches") for row in rows if row["name"] == "two"}
    assert launches[CONVOLUTION] == 2 and launches["pointwise"] == pytest.approx(1 / 3) and launches[IDLE] is None
    for name in (OURS, "two"):
        own = [row for row in rows if row["name"] == name]
        assert sum(row["share_of_run"] for row in own) == pytest.approx(1, abs=0.05)
        assert all(row["ms"] >= 0 for row in own) and own[-1]["kernels"] == IDLE
        busy = [row["ms"] for row in own[:-1]]
        assert busy == sorted(busy, reverse=True) and busy[0] > 0
    table = markdown(rows).splitlines()
    assert table[0] == "| case | precision | batch | contender | kernels | launches | ms | of the run | error |"
    assert "%" in table[2].split("|")[-3]
