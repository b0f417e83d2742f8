"""Settings of Megatron's model configuration that change no result of a forward pass.

Names of megatron-core's TransformerConfig 0.16 to 0.19 and of Megatron-Bridge's model providers,
by the subject that makes each harmless. Whatever value they have is accepted.
"""

from __future__ import annotations

MODEL: dict[str, str] = {
    "experts, of which a model without num_experts has none": """
        ep_overlap_early_attn_memory_release expert_gtp_weight_remat_size
        expert_model_parallel_size expert_tensor_parallel_num_weight_shards
        expert_tensor_parallel_size export_moe_apply_probs_on_input moe_apply_probs_on_input
        moe_aux_loss_coeff moe_deepep_num_sms moe_enable_deepep moe_enable_routing_replay
        moe_expert_capacity_factor moe_expert_rank_capacity_factor moe_extended_tp
        moe_ffn_hidden_size moe_flex_dispatcher_backend moe_flex_dispatcher_num_sms
        moe_grad_scale_func moe_grouped_gemm moe_hybridep_num_blocks_permute
        moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms
        moe_hybridep_num_sms_preprocessing moe_hybridep_pad_uneven_dispatch_inputs
        moe_input_jitter_eps moe_latent_size moe_layer_freq moe_layer_recompute
        moe_mlp_glu_interleave_size moe_ncclep_static_shape moe_ncclep_zero_copy
        moe_pad_expert_input_to_capacity moe_pad_experts_for_cuda_graph_inference
        moe_paged_stash moe_paged_stash_buffer_size_factor_cpu
        moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_page_size moe_per_layer_logging
        moe_permute_fusion moe_permute_fusion_into_hybridep moe_router_bias_update_rate
        moe_router_dtype moe_router_enable_expert_bias moe_router_force_biased
        moe_router_force_load_balancing moe_router_fusion moe_router_group_topk
        moe_router_load_balancing_type moe_router_num_groups moe_router_padding_for_fp8
        moe_router_padding_for_quantization moe_router_pre_softmax
        moe_router_quantile_balancing_ema moe_router_score_function moe_router_topk
        moe_router_topk_limited_devices moe_router_topk_scaling_factor
        moe_routing_trace_capture_hidden_states moe_routing_trace_capture_logits
        moe_routing_trace_dump_weights moe_routing_trace_max_training_iters
        moe_routing_trace_path moe_shared_expert_gate moe_shared_expert_glu_interleave_size
        moe_shared_expert_intermediate_size moe_shared_expert_overlap moe_single_grouped_bias
        moe_single_grouped_weight moe_token_dispatcher_type moe_token_drop_policy
        moe_token_dropping moe_upcycling_granularity moe_use_legacy_grouped_gemm
        moe_use_upcycling moe_z_loss_coeff overlap_dispatch_backward_with_experts_wgrad
        overlap_moe_expert_parallel_comm use_grouped_gemm_for_shared_expert
    """,
    "attention and layers of other kinds, each under a switch that is refused": """
        beta_fast beta_slow cache_mla_latents disable_mamba_mem_eff_path dsa_indexer_head_dim
        dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32 dsa_indexer_loss_coeff
        dsa_indexer_n_heads dsa_indexer_rope_interleaved dsa_indexer_rotate_activation
        dsa_indexer_scoring_relu dsa_indexer_skip_topk_offset dsa_indexer_topk
        dsa_indexer_topk_freq dsa_indexer_use_sparse_loss dsa_kernel_backend
        experimental_attention_variant_loss_scale_func freeze_base_for_mtp
        hetereogenous_dist_checkpoint hybrid_attention_ratio hybrid_mlp_ratio kv_lora_rank
        linear_conv_kernel_dim linear_key_head_dim linear_num_key_heads linear_num_value_heads
        linear_value_head_dim mamba_head_dim mamba_inference_conv_states_dtype
        mamba_inference_ssm_states_dtype mamba_num_groups mamba_num_heads mamba_state_dim
        mamba_training_ssm_states_dtype mla_down_proj_fusion mtp_detach_heads
        mtp_grad_scale_func mtp_hybrid_override_pattern mtp_loss_scaling_factor mtp_standalone
        mtp_use_repeated_layer mup_attn_scale_power mup_base_head_dim mup_base_hidden_size
        mup_embedding_mult mup_output_mult mup_width_mult original_max_position_embeddings
        q_lora_rank qk_head_dim qk_pos_emb_head_dim relative_attention_max_distance
        relative_attention_num_buckets retriever_report_topk_accuracies retriever_score_scaling
        retriever_seq_length retro_attention_gate retro_bert_tokenizer_type
        retro_bert_vocab_file retro_block_size retro_chunk_length retro_cyclic_train_iters
        retro_encoder_attention_dropout retro_encoder_hidden_dropout retro_encoder_layers
        retro_neighbor_dirs retro_num_neighbors retro_num_retrieved_chunks retro_project_dir
        retro_return_doc_ids retro_split_preprocessing retro_verify_neighbor_count retro_workdir
        use_mamba_mem_eff_path v_head_dim
    """,
    "parallel layout of the writer": """
        account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
        batch_p2p_comm batch_p2p_sync context_parallel_size cp_comm_type
        data_parallel_random_init data_parallel_sharding_strategy data_parallel_size
        deallocate_pipeline_outputs decoder_first_pipeline_num_layers
        decoder_last_pipeline_num_layers decoder_num_layers encoder_num_layers
        encoder_pipeline_model_parallel_size encoder_tensor_model_parallel_size
        first_pipeline_num_layers gtp_weight_remat_size hierarchical_context_parallel_sizes
        hybrid_context_parallel last_pipeline_num_layers local_rank max_seqlen_per_dp_cp_rank
        microbatch_group_size_per_vp_stage model_parallel_size
        num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
        num_layers_per_virtual_pipeline_stage
        num_microbatches_with_partial_activation_checkpoints
        num_virtual_stages_per_pipeline_rank overlap_p2p_comm overlap_p2p_comm_warmup_flush
        parallel_output pipeline_dtype pipeline_model_parallel_comm_backend
        pipeline_model_parallel_layout pipeline_model_parallel_split_rank rank
        scatter_embedding_sequence_parallel scatter_gather_tensors_in_pipeline sequence_parallel
        standalone_embedding_stage tensor_parallel_num_weight_shards
        transformer_pipeline_model_parallel_size use_ring_exchange_p2p use_tp_pp_dp_mapping
        variable_seq_lengths virtual_pipeline_model_parallel_size world_size
    """,
    "precision of training: weights are run in the type of --dtype": """
        accumulate_allreduce_grads_in_fp32 activation_func_fp8_input_store
        apply_query_key_layer_scaling attention_softmax_in_fp32 autocast_dtype
        batch_invariant_mode disable_bf16_reduced_precision_matmul enable_autocast
        first_last_layers_bf16 fp16_lm_cross_entropy fp32_residual_connection fp4 fp4_param
        fp4_param_gather fp4_quantizer_factory fp4_recipe fp8 fp8_amax_compute_algo
        fp8_amax_history_len fp8_dot_product_attention fp8_interval fp8_margin
        fp8_multi_head_attention fp8_output_proj fp8_param fp8_param_gather
        fp8_quantizer_factory fp8_recipe fp8_wgrad grad_reduce_in_bf16 keep_fp8_transpose_cache
        kitchen_attention_backend num_layers_at_end_in_bf16 num_layers_at_start_in_bf16
        te_precision_config_file tp_only_amax_red use_kitchen_attention
    """,
    "fusions and kernels, which compute the same": """
        apply_rope_fusion async_tensor_model_parallel_allreduce attention_backend
        bias_dropout_fusion clone_scatter_output_in_embedding cross_entropy_fusion_impl
        cross_entropy_loss_fusion cuda_graph_impl cuda_graph_modules
        cuda_graph_retain_backward_graph cuda_graph_scope cuda_graph_scope_deprecated
        cuda_graph_use_single_mempool cuda_graph_warmup_steps decode_only_cuda_graphs
        delay_offload_until_cuda_graph deprecated_use_mcore_models deterministic_mode
        disable_jit_fuser disable_parameter_transpose_cache disable_symmetric_registration
        enable_cuda_graph export_default_te_spec export_force_local_attention
        external_cuda_graph flash_attention_version flash_decode fused_residual_rmsnorm
        fused_single_qkv_rope gradient_accumulation_fusion gradient_reduce_div_fusion
        high_priority_a2a_comm_stream high_priority_stream_groups masked_softmax_fusion
        memory_efficient_layer_norm mlp_chunks_for_prefill mlp_chunks_for_training
        nccl_all_reduce_for_prefill no_persist_layer_norm persist_layer_norm symmetric_ar_type
        test_mode tp_comm_atomic_ag tp_comm_atomic_rs tp_comm_bootstrap_backend
        tp_comm_bulk_dgrad tp_comm_bulk_wgrad tp_comm_overlap tp_comm_overlap_ag
        tp_comm_overlap_cfg tp_comm_overlap_disable_fc1 tp_comm_overlap_disable_qkv
        tp_comm_overlap_rs tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_split_rs
        transformer_impl use_arbitrary_attention_mask use_flash_attn use_flashinfer_fused_rope
        use_fused_weighted_squared_relu use_inference_optimized_layers use_mcore_models
        use_te_rng_tracker use_transformer_engine_full_layer_spec
        use_transformer_engine_op_fuser
    """,
    "recompute, offload and memory of training": """
        _cpu_offloading_context activation_offload_fraction checkpoint_activations
        cpu_offloading cpu_offloading_activations cpu_offloading_double_buffering
        cpu_offloading_num_layers cpu_offloading_retain_pinned_cpu_buffers
        cpu_offloading_weights defer_embedding_wgrad_compute delay_grad_reduce
        delay_param_gather delay_wgrad_compute delta_offload_bytes_across_pp_ranks
        distribute_saved_activations fine_grained_activation_offloading
        fine_grained_offloading_max_inflight_offloads min_offloaded_tensor_size offload_modules
        recompute_activations recompute_granularity recompute_method recompute_modules
        recompute_num_layers use_torch_optimizer_for_cpu_offload wgrad_deferral_limit
    """,
    "initialisation and callables of training": """
        _pg_collection attention_dropout barrier_with_L1_time calculate_per_token_loss
        config_logger_dir ddp_config embedding_init_method embedding_init_method_std
        finalize_model_grads_func generation_config grad_scale_func grad_sync_func hf_model_id
        hf_model_revision hidden_dropout init_method init_method_std init_method_xavier_uniform
        init_model_with_meta_device mixed_precision_wrapper no_sync_func
        output_layer_init_method param_sync_func perform_initialization post_wrap_hook
        pre_wrap_hook qk_clip qk_clip_alpha qk_clip_threshold timers use_cpu_initialization
        wrap_with_ddp
    """,
}
"""Subject -> names, separated by blanks."""

UNDER_REFUSED_SWITCHES = (
    "experts, of which a model without num_experts has none",
    "attention and layers of other kinds, each under a switch that is refused",
)
"""Subjects of which a model that is run has nothing."""
